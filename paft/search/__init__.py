"""Which merge is best, by search: weights, density, method and weights by layers, on both held-out objectives.

    space    what is varied, and a trial's numbers as a merge recipe
    study    Optuna: sampler, storage, the loop over trials
    front    the trials that no other beats, scored on the test split, and written
    search   all of it, over one base in memory
"""
