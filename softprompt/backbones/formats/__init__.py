"""Files that hold base models: safetensors directories, GGUF, and the names of tensors in them."""
