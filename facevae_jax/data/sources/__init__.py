"""Where images come from: folders, archives, photographs."""
