"""What `make bench` measures. Each module's ``run()`` returns rows of name, value and unit."""
