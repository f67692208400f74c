"""Write, verify and convert a finished folder: configuration files, record and model card beside the tensors."""
