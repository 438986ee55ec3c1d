-- The shop sold compact discs, of which the data does not tell more.
SELECT
    'CD' AS product_id, 'Compact disc' AS product_name, 'Music' AS category, 14.99 AS price, 1 AS stock_quantity,
    'CDNOW' AS supplier, DATE'1997-01-01' AS created_date, true AS is_active
