"""Export to ONNX and TensorRT: not built yet. The names and shapes exports will use are those of `RWKVSAM`."""

if __name__ != "fastsam_rwkv.export":
    raise ImportError(f"this folder was imported as {__name__!r}; import it as 'fastsam_rwkv.export'")
