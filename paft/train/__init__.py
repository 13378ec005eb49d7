"""recipe -> adapter: TRL's trainers, subclassed at one seam (`compute_loss`)."""
