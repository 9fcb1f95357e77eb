"""What a person looks at: values gathered from a checkpoint or a plan, and their tables, plots and JSON.

    growth.py       what a plan will do to a base
    inspection.py   what a checkpoint holds
    tables.py       both, on a terminal (rich)
    plot.py         the weight scale by layer, as a figure (matplotlib)
"""
