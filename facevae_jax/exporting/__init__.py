"""A trained model as files that other programs read: safetensors, StableHLO, ONNX."""
