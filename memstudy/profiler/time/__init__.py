"""Step time, predicted: what each op asks of the GPU (`ops`), and the time that takes (`cost`)."""
