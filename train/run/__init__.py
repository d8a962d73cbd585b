"""What every long run needs: its identity, checkpoints, several processes, and a way to stop."""
