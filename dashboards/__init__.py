"""What people look at: the live page, and Grafana's boards."""
