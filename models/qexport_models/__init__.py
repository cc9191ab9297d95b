"""Model families: torch modules written for export, and the checkpoints they load."""
