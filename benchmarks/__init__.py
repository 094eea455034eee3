"""The harness: data, networks, pre-training, measuring, result rows and the command line."""
