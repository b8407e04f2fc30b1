//! Guest RAM: layout, regions and backends.
