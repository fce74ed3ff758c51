"""The model `shapes-vlm`: its pictures, its questions, how it was trained, and the finished model itself."""
