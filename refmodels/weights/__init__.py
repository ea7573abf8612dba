"""Weight files: one file format, one module. `keras_h5` and `safetensors` open a file as a read-only mapping from
tensor name to a lazy `Tensor`; `huggingface` turns Hugging Face tensors and configurations into ours; `files` opens
what a stranger wrote."""
