"""Weight files: one file format, one module. `keras_h5`, `safetensors` and `torch_bin` open a file, or the `shards` that an
index lists, as a read-only mapping from tensor name to a lazy `Tensor`; `torch_pickle` reads the pickle in a torch file;
`huggingface` turns Hugging Face tensors and configurations into ours."""
