"""Data preparation: from images and load_data.csv to masks and a dataset directory."""
