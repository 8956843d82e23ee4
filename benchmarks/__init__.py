"""Benchmarks of `make bench`. Each module's ``run()`` returns rows of name, value and unit."""
