"""Groups of subcommands of ``ckd-fed``."""
