"""Weight files: one file format, one module. `keras_h5`, `safetensors` and `torch_bin` open a file, or the `shards` that an
index lists, as a read-only mapping from tensor name to a lazy `Tensor`; `torch_pickle` reads the pickles in a torch file,
`torch_legacy` a file of torch before 1.6; `huggingface` turns Hugging Face tensors and configurations into ours."""
