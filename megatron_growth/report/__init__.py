"""What a person looks at: what growth will do, and what a checkpoint holds.

Values are gathered first and shown separately, as tables, figures or JSON.

    growth.py       what a plan will do to a base
    inspection.py   what a checkpoint holds
    tables.py       both, on a terminal (rich)
    verification.py what verification found
    plot.py         the weight scale by layer, as a figure (matplotlib)
"""
