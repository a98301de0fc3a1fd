"""The adapted model: a frozen backbone, the modules in its slots, and a head."""
