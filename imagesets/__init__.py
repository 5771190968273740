"""Reading images: from one file to one tensor, whole data sets, and the loaders of training and evaluation."""
