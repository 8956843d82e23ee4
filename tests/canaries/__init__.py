"""Canaries: tests that die first when a package changes a private part that omni_train relies on."""
