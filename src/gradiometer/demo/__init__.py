"""The demo: two real training jobs, a server, and a screen that shows what they measure."""
