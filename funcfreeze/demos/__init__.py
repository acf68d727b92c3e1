"""What the `funcfreeze` command shows: small experiments on real data, measured while you watch.

They need the `demo` extra; nothing else in the library imports them.
"""
