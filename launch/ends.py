"""How runs end, and which of these ends are worth another start."""

EXIT_REQUEUE = 75
# Done, wrong flags, config or data, not finite, no progress: another start would end alike.
FINAL = (0, 2, 64, 70, 93)
