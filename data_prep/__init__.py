"""The offline stage: TIFFs and load_data.csv in, masks and a dataset directory out."""
