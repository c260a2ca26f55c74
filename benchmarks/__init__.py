"""What the project's own figures are measured with; nothing in ``fwpkm`` imports this."""
