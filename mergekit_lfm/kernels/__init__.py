"""Operations on blocks of tensors. Importing them imports no torch: it is imported when they are called."""
