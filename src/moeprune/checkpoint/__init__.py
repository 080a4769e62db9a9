"""What a checkpoint is: where its experts are, how it is read, loaded, cut and written."""
