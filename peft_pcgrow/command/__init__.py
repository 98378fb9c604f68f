"""The command `pcgrow`: what the package does, for whoever has a model, a file of text and a shell. Above all rooms."""
