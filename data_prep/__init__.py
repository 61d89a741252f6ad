"""The offline stage: images and load_data.csv in, masks and a dataset directory out."""
