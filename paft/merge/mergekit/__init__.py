"""mergekit's YAML both ways, and mergekit as an engine: contracts.py what its methods take, reader.py a file into a recipe,
writer.py a merge into a file, engine.py runs mergekit itself on adapters that paft folds in float32."""
