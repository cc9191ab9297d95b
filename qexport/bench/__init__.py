"""Speed and memory of bundles, beside what they must beat, all measured in one run. Start with `qexport.bench.run`.

Nothing is imported here: the process of a contender imports this package, and must hold no more than it needs.
"""
