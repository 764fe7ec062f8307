"""The benchmarks: a folder per family, the commands beside them (``python tools/bench/NAME.py --help``).

``record.py`` reads and writes results, ``results/`` holds them. Imported as ``bench``, with ``tools`` on the path.
"""
