"""Tests of the tests: faults that a person would make, planted one at a time, and whether a test notices.

``python -m tests.faults`` plants all of them, in a copy of the tree; CONTRIBUTING.md says when.
"""
