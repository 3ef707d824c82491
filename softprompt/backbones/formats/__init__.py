"""The file formats of base models: safetensors directories and GGUF files."""
