"""Build what a training needs: options, model, datasets, collators and callbacks of the stock `Trainer`."""
