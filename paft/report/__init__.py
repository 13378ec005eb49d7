"""From deltas and runs to numbers, and from numbers to tables, JSON, pages and figures.

    sources      names -> parts: adapters with or without base, models, delta files; each part a delta read by blocks
    scan         blocks -> counts and a histogram, in one pass (kernels: the same, compiled); histogram: quantiles, Gini, bounds
    moments      a part -> its measures; spectrum: singular values; onbase: beside W; reference: Gaussian and Laplace values
    sparsity     a source -> SparsityReport (groups: layers, kinds, all; verdict: sparse, small, dense, dead)
    norms        a source -> NormReport: what the factors tell alone
    interference two sources -> Interference (overlap: entry by entry; angles: spaces; advice: what to try)
    *_tables     reports -> rows and columns
    render       rows and columns -> terminal table, Markdown, JSON (the one writer of all reports; no torch)
    plots, maps, trajectory  reports and points -> figures (only these load matplotlib); labels: names beside points
    page         reports -> one HTML page that needs nothing else
    headtohead   the table of a run; seeds: of several that differ in the seed; paired: means, errors, bootstrap intervals
    trainings    logs of trainings -> gaps, ideal distance, costs; trajectory: their figures, and those of seeds

SCHEMA.md says what the JSON means. Importing the package loads none of them.
"""
