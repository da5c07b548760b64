"""Measurements. They report and never judge: a number depends on the machine and its load.

Every comparison is made in one run, interleaved, on one server: read the ratios.
"""
