"""Screening results: active treatments, dose response, similarity and changed features."""
