"""The network as a graph: tracing, rebuilding, folding, channels."""
