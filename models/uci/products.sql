-- UCI Online Retail: one row per stock code that was sold for a price, with name and price of its last sale.
--
-- The data has neither categories nor stock. `D` (discount) and `M` (manual) are no products; see transactions.sql.
--
-- source online_retail: online*retail*, uci*, data.csv
-- columns online_retail: StockCode, Description, Quantity, Price, UnitPrice

WITH sales AS (
    SELECT
        upper(trim(StockCode)) AS product_id,
        trim(Description) AS product_name,
        CAST(try_cast(coalesce(Price, UnitPrice) AS DECIMAL(12, 4)) AS DECIMAL(12, 2)) AS price,
        _delivery, _source_file, _source_row
    FROM online_retail
    WHERE try_cast(Quantity AS INT) > 0 AND try_cast(coalesce(Price, UnitPrice) AS DECIMAL(12, 4)) >= 0.01
        AND upper(trim(StockCode)) NOT IN (
            '', 'D', 'M', 'POST', 'DOT', 'C2', 'B', 'AMAZONFEE', 'BANK CHARGES', 'CRUK', 'S', 'ADJUST', 'ADJUST2',
            'TEST001', 'TEST002'
        )
)
SELECT DISTINCT
    product_id, product_name, CAST(price AS STRING) AS price, _delivery, _source_file, _source_row
FROM (
    SELECT *, ROW_NUMBER() OVER (PARTITION BY product_id ORDER BY _delivery DESC, _source_row DESC) AS recency
    FROM sales
)
WHERE recency = 1
