"""Files of training data: found, told apart by their content, and read row by row."""
