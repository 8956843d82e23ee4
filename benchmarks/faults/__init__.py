"""What a run survives, tried: real commands in real processes, killed, stopped, damaged and starved, and counted."""
