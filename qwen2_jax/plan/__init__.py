"""What a program will need and how long it will take, asked of the TPU compiler on a machine without a TPU."""
