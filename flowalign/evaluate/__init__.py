"""Benchmark suites, statistics, fidelity measures and the HTML report."""
