"""From deltas and runs to numbers, and from numbers to tables, JSON and figures.

    moments            a LoRA module -> sums over its entries, in one pass over tiles
    sparsity           an adapter -> SparsityReport: how much of it is near zero, and is that *sparse* or only *small*
    sparsity_tables    SparsityReport -> rows and columns
    render             rows and columns -> terminal table, Markdown, JSON (the one writer of all reports; no torch)
    plots              reports and points -> figures (the only place that loads matplotlib)
    labels             where the names beside the points of a figure go

Importing the package loads none of them.
"""
