"""Starting runs: `launch.local` on one machine with torchrun."""
