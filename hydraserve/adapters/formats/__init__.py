"""One file a format; see `hydraserve.adapters.checkpoint`."""
