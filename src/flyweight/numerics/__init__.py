"""Floor 0: tensors in, tensors out. No models, no files, no clocks."""
