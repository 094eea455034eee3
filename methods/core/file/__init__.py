"""The file: container, layer blocks, streams, entropy coding."""
